"""Models of our own layout in transformers' Auto classes, which `import moestro.hf` tells about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moestro.models import DecoderLM, build_language_model, load_model, save_model


class MoestroConfig(PretrainedConfig):
    """config.json of a model that no stock architecture computes.

    Args:
        moestro: our notes; `moestro["arguments"]` are the arguments of `build_language_model`.
        rest: what all configurations of transformers take.
    """

    model_type = "moestro"

    def __init__(self, moestro: dict[str, Any] | None = None, **rest: Any):
        self.moestro = moestro or {}
        arguments = self.moestro.get("arguments", {})
        self.hidden_size = arguments.get("width")
        self.num_hidden_layers = arguments.get("num_layers")
        self.num_attention_heads = arguments.get("num_heads")
        self.max_position_embeddings = arguments.get("max_length")
        rest.setdefault("tie_word_embeddings", False)
        super().__init__(**rest)


class MoestroForCausalLM(PreTrainedModel, GenerationMixin):
    """A moestro language model with the manners of transformers: `from_pretrained`, `generate`, labels.

    Folders are those of `moestro.save_model`, read strictly. Generation computes the whole sequence for every
    token; `moestro.inference.generate` keeps keys and values.

    Args:
        config: see `MoestroConfig`.
        decoder: the model; None = built from the configuration, untrained.
    """

    config_class = MoestroConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: MoestroConfig, decoder: DecoderLM | None = None):
        super().__init__(config)
        if decoder is None and "arguments" not in config.moestro:
            raise ValueError(
                'config.moestro has no "arguments"; use the config.json of a folder that moestro.save_model wrote'
            )
        self.decoder = decoder or build_language_model(**config.moestro["arguments"])
        if config.moestro["arguments"]["tied_embeddings"]:
            self._tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *args: Any, **settings: Any
    ) -> MoestroForCausalLM:
        """The model of a local folder.

        Args:
            folder: that `moestro.save_model` wrote.
            args: none.
            settings: `config`, `dtype`, and `device_map` with one device; others are refused or mean nothing here.

        Raises:
            ValueError: no such folder, a damaged one, or a setting that this model does not take.
        """
        config = settings.pop("config", None) or MoestroConfig.from_pretrained(folder)
        decoder = load_model(Path(folder))
        dtype = settings.pop("dtype", None) or settings.pop("torch_dtype", None)
        device = settings.pop("device_map", None)
        _refuse(settings, args)
        if dtype not in (None, "auto"):
            decoder.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if device is not None:
            decoder.to(_single_device(device))
        return cls(config, decoder).eval()

    def save_pretrained(  # type: ignore[override]
        self, folder: Any, *, push_to_hub: bool = False, **settings: Any
    ) -> None:
        """Write the folder that `moestro.load_model` and `from_pretrained` open, in a stock layout if one fits.

        Args:
            folder: where.
            push_to_hub: refused.
            settings: what a Trainer passes; there is one file and always safetensors.
        """
        if push_to_hub:
            raise ValueError("moestro uploads nothing; save the folder and upload it with `hf upload`")
        save_model(self.decoder, folder)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.head

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: `build_language_model` has drawn the weights as the recipes say."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **settings: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits, and the mean cross-entropy of the next tokens when there are labels.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: 0 for padding, `[batch, length]`; None = no padding.
            labels: `[batch, length]`, -100 where no loss is wanted.
            return_dict: False = a tuple.
            settings: what transformers passes to every model and this one does not need.
        """
        valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        logits = self.decoder(input_ids, valid)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _refuse(settings: dict[str, Any], args: tuple[Any, ...]) -> None:
    harmless = {"trust_remote_code", "local_files_only", "use_safetensors", "low_cpu_mem_usage", "weights_only"}
    harmless |= {"attn_implementation", "revision", "cache_dir", "token", "force_download", "proxies", "subfolder"}
    harmless |= {"adapter_kwargs", "code_revision", "commit_hash", "_commit_hash", "_from_auto", "resume_download"}
    unknown = sorted(set(settings) - harmless)
    if unknown or args:
        raise ValueError(
            f"a moestro model does not take {', '.join(unknown) or args}; it takes dtype and device_map"
        )


def _single_device(device_map: Any) -> Any:
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) > 1:
        raise ValueError(f"a moestro model lives on one device, not on {sorted(map(str, devices))}")
    device = devices.pop()
    return "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device


def register_auto_classes() -> None:
    """Tell transformers' Auto classes about the model type `moestro`; twice is once."""
    AutoConfig.register("moestro", MoestroConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoestroConfig, MoestroForCausalLM, exist_ok=True)
