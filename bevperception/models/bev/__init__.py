"""The bird's-eye-view grid, its attention modules, its encoder and its memory."""
