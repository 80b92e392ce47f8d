"""Reading and writing of Hugging Face folders, packed folders, sparsity patterns and scales. No torch."""
