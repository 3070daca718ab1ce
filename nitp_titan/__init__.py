"""Next Implicit Token Prediction (NITP, arXiv 2605.24956) on TorchTitan.

The package imports nothing by itself, so that reading recipes stays fast.
"""
