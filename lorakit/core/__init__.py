"""Tensor maths of low-rank adaptation: the delta, its autograd functions, routing plans. Imports torch alone."""
