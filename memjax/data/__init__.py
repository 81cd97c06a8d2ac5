"""Data: tokenizers, corpora and pipelines. Importing it loads numpy; tokenizers and grain wait for their first use."""

from memjax.data.corpus import Document as Document
from memjax.data.corpus import TokenizedDocuments as TokenizedDocuments
from memjax.data.corpus import cut as cut
from memjax.data.folder import File as File
from memjax.data.folder import Skipped as Skipped
from memjax.data.folder import read_folder as read_folder
from memjax.data.folder import standard_library as standard_library
from memjax.data.pipeline import generated as generated
from memjax.data.pipeline import mark_absl_flags as mark_absl_flags
from memjax.data.pipeline import packed_documents as packed_documents
from memjax.data.pipeline import token_windows as token_windows
from memjax.data.tokenizer import SPECIAL_TOKENS as SPECIAL_TOKENS
from memjax.data.tokenizer import BPETokenizer as BPETokenizer
from memjax.data.tokenizer import ByteTokenizer as ByteTokenizer
from memjax.data.tokenizer import DecodeStream as DecodeStream
from memjax.data.tokenizer import Tokenizer as Tokenizer
from memjax.data.tokenizer import load_tokenizer as load_tokenizer
from memjax.data.tokenizer import train_bpe as train_bpe
