"""Every method on one model and data set: one table, one picture (Hu et al. 2021, section 5, Figure 2, appendix F)."""
