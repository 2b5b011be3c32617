"""Reading public matting and referring releases exactly as they lie on disk; one module for each."""
