"""Norms that a block may take in."""
from torch import nn
def has_activation(module):
    return False
