"""The operators that select and aggregate neighbors, and their backends.

`operators.py` declares each once: schema, fake, gradient, FLOPs. `reference.py` is the plain form with the full matrix of
scores, `chunked.py` runs on any device in bounded memory, `cpu.py` and `cuda.py` (Triton) are faster forms.
`attention.py` declares a search and what follows it as one operator, for CUDA. PyTorch's dispatcher chooses between them by
the device of the tensors; `backend.use` chooses by hand.
"""
