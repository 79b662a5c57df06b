"""HOPE models and their tokenizers as transformers knows models (extra `hf`).

Importing this package registers them, so that `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` read
folders that `export_folder`, or `nl export --huggingface`, has written:

    import nested_learning.hf
    model = AutoModelForCausalLM.from_pretrained("folder")
"""

from nested_learning.extras import MissingExtraError

try:
    import transformers as _transformers
except ImportError as error:
    raise MissingExtraError("models for transformers", "transformers") from error

from nested_learning.hf.config import HopeForCausalLMConfig
from nested_learning.hf.folder import export_folder
from nested_learning.hf.model import HopeForCausalLM, StateCache
from nested_learning.hf.tokenizer import HopeTokenizer

__all__ = ["HopeForCausalLM", "HopeForCausalLMConfig", "HopeTokenizer", "StateCache", "export_folder"]

_transformers.AutoConfig.register(HopeForCausalLMConfig.model_type, HopeForCausalLMConfig, exist_ok=True)
_transformers.AutoModelForCausalLM.register(HopeForCausalLMConfig, HopeForCausalLM, exist_ok=True)
_transformers.AutoTokenizer.register(HopeForCausalLMConfig, tokenizer_class=HopeTokenizer, exist_ok=True)
