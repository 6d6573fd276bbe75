"""Checks of the options of `inf_cl_loss`: which combine, and the checked form that the implementations take."""
