"""A tiny random MoE model in Megatron-core and the ways to generate with it, used by several test files.

Every loop works with a stock and a PiKV context alike and returns the tokens with the logits that chose them. Import
this after `cpu_compat.install()` (the conftest beside it sees to that).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY = 256
RUNTIME = {"max_tokens": 8192, "max_requests": 8, "window": 16, "sinks": 2, "block_size": 8}
"""Small windows and blocks, so that short tests seal many blocks."""


def tiny_config(**changes):
    settings = {
        "num_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "ffn_hidden_size": 96,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 64,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "init_method_std": 0.2,  # peaked attention: an error in the cache shows in the logits
    }
    return TransformerConfig(**{**settings, **changes})


def stock_spec(config):
    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )


def build(config, spec=None, seed=7, **options):
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "max_sequence_length": 512, "position_embedding_type": "rope", **options}
    model = GPTModel(config=config, transformer_layer_spec=spec or stock_spec(config), **settings)
    return model.to(config.params_dtype).eval()


def twin(model, config, spec):
    """A model from another spec with the same weights."""
    other = build(config, spec, seed=8)
    other.load_state_dict(model.state_dict(), strict=True)
    return other


def hybrid_model(monkeypatch, pattern):
    """A HybridModel of attention (*) and MoE (E) layers, and the spec of its stack."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    config = tiny_config(num_layers=len(pattern))
    part = stock_spec(config).submodules
    monkeypatch.setattr(hybrid_block, "TENorm", part.input_layernorm)  # its only norm is Transformer Engine's
    attention = TransformerLayerSubmodules(
        input_layernorm=part.input_layernorm, self_attention=part.self_attention, self_attn_bda=part.self_attn_bda
    )
    experts = TransformerLayerSubmodules(pre_mlp_layernorm=part.pre_mlp_layernorm, mlp=part.mlp, mlp_bda=part.mlp_bda)
    assert attention.mlp in (IdentityOp, IdentityFuncOp)
    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            moe_layer=ModuleSpec(module=TransformerLayer, submodules=experts),
        ),
    )
    torch.manual_seed(5)
    return HybridModel(config, stack, 256, 512, pattern, position_embedding_type="rope").eval(), stack


def causal_mask(tokens):
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1)


def prompts_of(*lengths, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY - 1, (n,), generator=generator) for n in lengths]


def recompute(model, tokens):
    """Logits [batch, tokens, vocabulary] without any cache."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, causal_mask(tokens.shape[1]))


@torch.no_grad()
def feed_static(model, context, tokens):
    """Appends tokens [batch, tokens] to a static context; logits [batch, vocabulary] after the last one."""
    start, count = context.sequence_len_offset, tokens.shape[1]
    context.enable_decode_mode() if start else context.enable_prefill_mode()
    positions = torch.arange(start, start + count).expand_as(tokens)
    logits = model(tokens, positions, None, inference_context=context)[:, -1]
    context.increment_sequence_len_offset(count)
    return logits


def forced_static(model, context, prompts, tokens):
    """Logits [1 + tokens, batch, vocabulary] after prompts [batch, n], then after each of tokens [batch, tokens]."""
    steps = [prompts, *tokens.split(1, dim=1)]
    return torch.stack([feed_static(model, context, step) for step in steps])


@torch.no_grad()
def greedy_static(model, context, prompts, steps, chunk=None):
    """Prompts [batch, tokens] of one length -> (tokens [batch, steps], logits [steps, batch, vocabulary])."""
    chosen, logits = [], []
    todo = list(prompts.split(chunk or prompts.shape[1], dim=1))
    while len(chosen) < steps:
        tokens = todo.pop(0) if todo else chosen[-1]
        start, count = context.sequence_len_offset, tokens.shape[1]
        if chosen:
            context.enable_decode_mode()
        positions = torch.arange(start, start + count).expand_as(tokens)
        last = model(tokens, positions, None, inference_context=context)[:, -1]
        context.increment_sequence_len_offset(count)
        if not todo:
            chosen.append(last.argmax(-1, keepdim=True))
            logits.append(last)
    return torch.cat(chosen, 1), torch.stack(logits)


@torch.no_grad()
def greedy_dynamic(model, context, prompts, lengths, most):
    """Continuous batching by hand: requests join as others leave, at most `most` at a time.

    Returns request index -> (tokens, logits [tokens, vocabulary]); `lengths` are the tokens wanted per request.
    """
    waiting = list(range(len(prompts)))
    answers = {i: ([], []) for i in waiting}
    while waiting or context.has_unfinished_requests():
        while waiting and context.total_request_count < most:
            i = waiting.pop(0)
            params = SamplingParams(num_tokens_to_generate=lengths[i], top_k=1, termination_id=-1)
            context.add_request(DynamicInferenceRequest(request_id=i, prompt_tokens=prompts[i], sampling_params=params))
        context.initialize_attention_state()
        tokens, positions = context.current_input_and_position_ids()
        logits = model(tokens, positions, None, inference_context=context, runtime_gather_output=True)[0]
        live = slice(context.paused_request_count, context.total_request_count)
        active = context.request_ids[live].tolist()
        logits = logits[context.request_query_lengths[live].cumsum(0) - 1]  # after each request's last token
        chosen = logits.argmax(-1)
        for row, i in enumerate(active):
            answers[i][0].append(chosen[row].item())
            answers[i][1].append(logits[row].clone())
        goes_on = [len(answers[i][0]) < lengths[i] for i in active]
        context.update_requests(torch.tensor(goes_on, dtype=torch.int32), chosen)
    return {i: (tokens, torch.stack(logits)) for i, (tokens, logits) in answers.items()}


class ByteTokenizer:
    vocab_size = VOCABULARY
    bos = None
    eod = -1  # nothing ends early
    pad = 0

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, ids, **options):
        return " ".join(str(i) for i in ids)


def as_text(prompt):
    return " ".join(str(i) for i in prompt.tolist())


@dataclass
class Served:
    tokens: list
    logits: list
    most_live: int
    steps: int


def serve(model, context, prompts, steps, static, observe=None):
    """Runs one of Megatron's engines; logits are taken at the model's output, call by call."""
    calls, live = [], []

    def record(module, arguments, output):
        calls.append(output.detach().float().clone())
        live.append(observe() if observe else 0)

    watch = model.register_forward_hook(record)
    try:
        controller = TextGenerationController(GPTInferenceWrapper(model, context), ByteTokenizer())
        counts = steps if isinstance(steps, list) else [steps] * len(prompts)
        texts = [as_text(p) for p in prompts]
        if static:
            params = SamplingParams(num_tokens_to_generate=steps, top_k=1, termination_id=-1)
            engine = StaticInferenceEngine(controller, max_batch_size=len(prompts), random_seed=1, legacy=True)
            finished = engine.generate(texts, sampling_params=params)
            tokens = [r.generated_tokens.tolist() for r in finished]
        else:
            engine = DynamicInferenceEngine(controller, context)
            tokens = _generate_dynamic(engine, texts, counts)
    finally:
        watch.remove()
        InferenceMode.unset_active()
    return Served(tokens, calls, max(live, default=0), len(calls))


def _generate_dynamic(engine, texts, counts):
    if len(set(counts)) == 1:
        params = SamplingParams(num_tokens_to_generate=counts[0], top_k=1, termination_id=-1)
        records = engine.generate(texts, params)
    else:  # what engine.generate does, with a length of its own per request
        for request_id, (text, count) in enumerate(zip(texts, counts, strict=True)):
            params = SamplingParams(num_tokens_to_generate=count, top_k=1, termination_id=-1)
            engine.add_request(request_id, text, params)
        records = []
        while engine.has_unfinished_requests():
            records += engine.step_modern()["finished_request_records"]
        records.sort(key=lambda record: record.request_id)
    return [list(record.merge().generated_tokens) for record in records]


def inference_config(**changes):
    settings = {
        "block_size_tokens": 16,
        "buffer_size_gb": 0.01,
        "max_sequence_length": 512,
        "max_requests": 4,
        "max_tokens": 512,
        "num_cuda_graphs": None,
    }
    return InferenceConfig(**{**settings, **changes})


def install_torch_flash_attention(monkeypatch):
    """flash-attn's two kernels in plain torch, so that Megatron's own dynamic attention runs as a baseline on CPU."""
    from megatron.core.transformer import attention

    def attend(q, k_cache, v_cache, length, blocks, scale):
        count = -(-length // k_cache.shape[1])
        k, v = (c[blocks[:count].long()].flatten(0, 1)[:length].float() for c in (k_cache, v_cache))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
        visible = torch.ones(q.shape[0], length, dtype=torch.bool).tril(length - q.shape[0])
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)

    def varlen(q, k, v, cu_q, cu_k, *args, softmax_scale, block_table, **options):
        out = torch.zeros_like(q)
        lengths = cu_k.diff().tolist()
        starts = cu_q.tolist()
        for i, length in enumerate(lengths):
            rows = slice(starts[i], starts[i + 1])
            if rows.stop > rows.start:
                out[rows] = attend(q[rows], k, v, length, block_table[i], softmax_scale)
        return out

    def with_kvcache(q, k_cache, v_cache, cache_seqlens, softmax_scale, block_table, **options):
        out = torch.zeros_like(q)
        for i, length in enumerate(cache_seqlens.tolist()):
            if length:
                out[i] = attend(q[i], k_cache, v_cache, length, block_table[i], softmax_scale)
        return out

    monkeypatch.setattr(attention, "flash_attn_varlen_func", varlen)
    monkeypatch.setattr(attention, "flash_attn_with_kvcache", with_kvcache)
