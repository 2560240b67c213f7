"""Native CPU kernels: what a mask saves in bytes and time. Imports only core."""
