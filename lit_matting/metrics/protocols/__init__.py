"""Locked evaluation protocols, one YAML file each; ``lit_matting.metrics.protocol`` reads and checks them."""
