"""The memory is a bank outside the window, searched and read back: it grows over devices, host and disk."""

from memjax.in_storage.msa import MSA as MSA
from memjax.in_storage.msa import DocumentAttention as DocumentAttention
