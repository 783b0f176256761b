"""XLA's flags for programs that run a few times after they were compiled, as most tests' do."""

# About two thirds of the compile time; answers keep their margin.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
