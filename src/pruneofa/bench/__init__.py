"""`pruneofa bench`: this engine beside the peers, and from which sparsity on the zeros pay."""
