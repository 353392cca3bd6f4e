"""The control plane extension: who owns which bucket, and who may mount it."""
