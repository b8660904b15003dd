"""Text to tokens to batches: exactly repeatable, resumable at any step."""

from moestro.data.batches import Batch, Batches, Share
from moestro.data.corpus import Corpus, prepare_corpus
from moestro.data.documents import DOMAINS, Document, default_documents, read_documents
from moestro.data.tokenfile import TokenFile, write_tokens
from moestro.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, open_tokenizer, train_bpe

__all__ = [
    "DOMAINS",
    "BPETokenizer",
    "Batch",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "Share",
    "TokenFile",
    "Tokenizer",
    "default_documents",
    "open_tokenizer",
    "prepare_corpus",
    "read_documents",
    "train_bpe",
    "write_tokens",
]
