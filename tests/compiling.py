"""XLA's flags for programs that run a few times after they were compiled, as most tests' do."""

# A fifth of the time that XLA takes without them; answers keep their margin. Kernels made through MLIR cost
# most (jaxlib 0.11.2), since each begins by registering every dialect; in one part, a program takes fewer
# memory maps.
QUICK_COMPILE = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
