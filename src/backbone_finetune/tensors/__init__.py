"""The values of tensors of any kind: their plain parts, shared memory, and checksums on their device."""
