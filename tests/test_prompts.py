"""Reviews as prompts: what the tokenizer makes of them, and which tokens answer."""

import pytest
from tests.tiny_gguf import write_tiny

from qft_utils import gguf_files
from qft_utils.prompts import ANSWERS, answers, prompts
