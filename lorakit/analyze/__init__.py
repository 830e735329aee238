"""The paper's rank study (section 7, appendices G and H) on a user's own adapters, and the smaller adapter that follows."""
