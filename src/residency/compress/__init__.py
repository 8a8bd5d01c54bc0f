"""Make a model smaller: distillation, layer and head surgery, sparsity (model → smaller model)."""
