"""Training: a loop over optax, grain and orbax that resumes exactly."""

from memjax.train.checkpoint import load_params as load_params
from memjax.train.loop import FitResult as FitResult
from memjax.train.loop import fit as fit
from memjax.train.losses import lm_loss as lm_loss
from memjax.train.metrics import JSONLWriter as JSONLWriter
from memjax.train.optimizer import make_optimizer as make_optimizer
from memjax.train.progress import Progress as Progress
