"""Published language models in Hugging Face's layout, read as ours and written back."""

from memjax.lm.weights.folder import is_pretrained as is_pretrained
from memjax.lm.weights.folder import load_pretrained as load_pretrained
from memjax.lm.weights.folder import save_pretrained as save_pretrained
from memjax.lm.weights.folder import special_tokens as special_tokens
