"""The data sets of an evaluation: which ones, what is wrong with them, and what they will take."""
