"""Flags of other servers that users bring along. What they ask for is had anyway, or it is said what to do.

Flags, YAML keys and keywords alike. Source of the names: SGLang's server arguments.
"""

_XLA = "XLA compiles every program for its size before readiness"
_KERNELS = "kernels are chosen by the device"
_STEP = "--chunked-prefill-size and --max-running-requests bound a step"
_ORDER = "requests go by priority, then by arrival"
WITHOUT_EFFECT = {
    "attention_backend": _KERNELS,
    "cuda_graph_bs": _XLA,
    "cuda_graph_max_bs": _XLA,
    "decode_attention_backend": _KERNELS,
    "deepep_mode": _KERNELS,
    "disable_cuda_graph": _XLA,
    "disable_overlap_schedule": "the next step is launched before the last one is read",
    "enable_cache_report": "cached tokens are always told",
    "enable_dp_lm_head": "the vocabulary is spread over each attention group",
    "enable_metrics": "/metrics is always there",
    "enable_mixed_chunk": "prompts and decode rows share steps",
    "enable_priority_scheduling": _ORDER,
    "enable_torch_compile": _XLA,
    "fp8_gemm_backend": _KERNELS,
    "load_balance_method": "replicas are taken in turn, and ranks by their load",
    "log_level_http": "--log-level is for all",
    "max_prefill_tokens": _STEP,
    "moe_dense_tp_size": "dense layers are split as attention is",
    "prefill_attention_backend": _KERNELS,
    "radix_eviction_policy": "what was used longest ago goes first",
    "sampling_backend": _KERNELS,
    "schedule_conservativeness": _STEP,
    "schedule_policy": _ORDER,
    "skip_server_warmup": _XLA,
    "trust_remote_code": "no code of a checkpoint is run",
    "watchdog_timeout": "an engine that stops is noticed by what it does",
}
"""Why a flag changes nothing here."""

_LORA = "LoRA is not served yet"
_ONE_ENGINE = "prefill and decode are not split over engines; see --dp-size and --tp"
_PIPELINE = "layers are not split over devices; see --tp and --ep"
_CACHE = "KV stays on the devices; see --mem-fraction-static and --kv-cache-dtype"
_STREAM = "events of /generate have all of the text so far; the OpenAI routes send what is new"
_TRACES = "the gateway writes traces"
REFUSED = {
    "admin_api_key": "use --api-key, or the gateway's --control-plane-api-keys",
    "cpu_offload_gb": _CACHE,
    "disaggregation_mode": _ONE_ENGINE,
    "enable_deterministic_inference": "greedy tokens do not depend on the batch with --dtype float32",
    "enable_hierarchical_cache": _CACHE,
    "enable_lora": _LORA,
    "enable_trace": _TRACES,
    "hicache_ratio": _CACHE,
    "hicache_size": _CACHE,
    "incremental_streaming_output": _STREAM,
    "init_expert_location": "use --enable-eplb",
    "kv_events_config": "/kv_events tells them without",
    "lora_paths": _LORA,
    "otlp_traces_endpoint": _TRACES,
    "pipeline_parallel_size": _PIPELINE,
    "pp_size": _PIPELINE,
    "stream_output": _STREAM,
}
"""Why it cannot be had, and what to do instead."""
