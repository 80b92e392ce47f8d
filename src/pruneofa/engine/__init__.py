"""The engine: runs a packed or plain model folder with the native kernels. No torch."""
