"""depthmix: how a deep network carries information from layer to layer."""
