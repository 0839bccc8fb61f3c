"""The blend algorithm on tensors, the same for every engine: selection, key shift, attention by position."""
