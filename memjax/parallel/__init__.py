"""Meshes, sequence parallelism and sharded banks. Knows the contract, and no architecture by name."""

from memjax.parallel.mesh import make_mesh as make_mesh
from memjax.parallel.sequence import SequenceParallel as SequenceParallel
from memjax.parallel.sequence import sequence_parallel as sequence_parallel
