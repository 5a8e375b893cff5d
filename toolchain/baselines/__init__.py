"""Calibration-only algorithms of other papers, to compare reconstruction with: each file names its paper and what of it is implemented."""
