"""The engine: a packed or plain folder, run by the native kernels. No torch."""
