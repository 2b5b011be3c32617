"""The network of the paper's figure and its parts."""
