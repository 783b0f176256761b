"""Flags of other servers that users bring along. What they ask for is had anyway, or it is said what to do.

Flags, YAML keys and keywords alike. Source of the names: SGLang's server arguments, and a few of vLLM's.
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
    "decode_log_interval": "steps are not logged; /metrics has their rates",
    "deepep_mode": _KERNELS,
    "disable_cuda_graph": _XLA,
    "disable_cuda_graph_padding": _XLA,
    "disable_overlap_schedule": "the next step is launched before the last one is read",
    "disable_shared_experts_fusion": _KERNELS,
    "enable_auto_tool_choice": "calls are read where --tool-call-parser is given",
    "enable_cache_report": "cached tokens are always told",
    "enable_dp_lm_head": "the vocabulary is spread over each attention group",
    "enable_metrics": "/metrics is always there",
    "enable_mixed_chunk": "prompts and decode rows share steps",
    "enable_p2p_check": "which devices reach each other's memory is always looked at",
    "enable_priority_scheduling": _ORDER,
    "enable_torch_compile": _XLA,
    "fp8_gemm_backend": _KERNELS,
    "load_balance_method": "replicas are taken in turn, and ranks by their load",
    "log_level_http": "--log-level is for all",
    "log_requests_level": "--log-requests has one level, without prompts and answers",
    "max_prefill_tokens": _STEP,
    "moe_dense_tp_size": "dense layers are split as attention is",
    "nccl_port": "devices of a host need no port, and hosts meet at --dist-init-addr",
    "prefill_attention_backend": _KERNELS,
    "radix_eviction_policy": "what was used longest ago goes first",
    "sampling_backend": _KERNELS,
    "schedule_conservativeness": _STEP,
    "schedule_policy": _ORDER,
    "show_time_cost": "/metrics has the times of requests",
    "skip_server_warmup": _XLA,
    "tokenizer_mode": "tokenizers are always the fast ones",
    "tokenizer_worker_num": "long texts are tokenized in threads beside the requests",
    "torch_compile_max_bs": _XLA,
    "triton_attention_num_kv_splits": _KERNELS,
    "trust_remote_code": "no code of a checkpoint is run",
    "watchdog_timeout": "an engine that stops is noticed by what it does",
}
"""Why a flag changes nothing here."""

_LORA = "LoRA is not served yet"
_ONE_ENGINE = "prefill and decode are not split over engines; see --dp-size and --tp"
_PIPELINE = "layers are not split over devices; see --tp and --ep"
_CACHE = "KV stays on the devices; see --mem-fraction-static and --kv-cache-dtype"
_TLS = "put a proxy in front, or the gateway with --tls-cert-path and --tls-key-path"
_STREAM = "events of /generate have all of the text so far; the OpenAI routes send what is new"
_TRACES = "the gateway writes traces"
REFUSED = {
    "admin_api_key": "use --api-key, or the gateway's --control-plane-api-keys",
    "allow_auto_truncate": "prompts that are too long are refused; clients shorten them",
    "cpu_offload_gb": _CACHE,
    "disaggregation_mode": _ONE_ENGINE,
    "download_dir": "set the environment variable HF_HOME to the directory",
    "enable_deterministic_inference": "greedy tokens do not depend on the batch with --dtype float32",
    "enable_hierarchical_cache": _CACHE,
    "enable_lora": _LORA,
    "enable_trace": _TRACES,
    "gpu_memory_utilization": "use --mem-fraction-static",
    "hicache_ratio": _CACHE,
    "hicache_size": _CACHE,
    "incremental_streaming_output": _STREAM,
    "init_expert_location": "use --enable-eplb",
    "is_embedding": "models that make embeddings are not served",
    "json_model_override_args": "change config.json in a copy of the checkpoint's directory",
    "kv_events_config": "/kv_events tells them without",
    "lora_paths": _LORA,
    "max_model_len": "use --context-length",
    "otlp_traces_endpoint": _TRACES,
    "pipeline_parallel_size": _PIPELINE,
    "pp_size": _PIPELINE,
    "preferred_sampling_params": "change generation_config.json; --sampling-defaults model takes it",
    "ssl_certfile": _TLS,
    "ssl_keyfile": _TLS,
    "stream_output": _STREAM,
    "weight_version": "use --served-model-name, which clients see",
}
"""Why it cannot be had, and what to do instead."""
