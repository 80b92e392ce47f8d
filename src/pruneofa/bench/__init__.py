"""`pruneofa bench`: the engine compared with other runtimes (peers), and the break-even sparsity."""
