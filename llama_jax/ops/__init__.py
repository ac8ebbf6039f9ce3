"""What the Llama is computed with: products, quantized weights, attention kernels, cross-entropy.

Every work-around for a compiler is in this package, once. It is chosen by the platform that the program is
lowered for (`jax.lax.platform_dependent`), not by the machine that lowers it; those that are a part of a
custom backward pass are chosen by `custom_vjp`. Each has a test in tests/ops/test_workarounds.py, which fails
where the plain form compiles as well. Measured with JAX 0.10.2 and 0.12.0.1 (TPU: libtpu 0.0.52).

| work-around | platform | needed for JAX | test |
|---|---|---|---|
| `products.matvec`, bf16: a duplicated row | cpu | 0.10, 0.12 | test_matvec_bf16_converts_the_weight |
| `products.matvec`, f32: four parts | cpu | 0.10, 0.12 | test_matvec_f32_is_one_loop |
| `products.query_key_product`: keys first | cpu | 0.10, 0.12 | test_query_key_product_transposes_the_cache |
| `products.weight_gradient`: transpose | cpu | 0.10, 0.12 | test_weight_gradient_bf16_runs_in_f32 |
| `linear.project_heads`: wo as a matrix | cpu | 0.10, 0.12 | test_project_heads_transposes_wo |
| `layouts.write_slices`: an index per head | cpu | 0.10, 0.12 | test_write_slices_copies_the_cache |
| `layouts.fp8_bits`: uint8 | cpu | 0.10, 0.12 | test_a_write_to_fp8_converts_the_cache |
| `quantization._late_product` | cpu | 0.10, 0.12 | test_loops_hoist_dequantization |
| `quantization._int8_product`: two rows | cpu | 0.10, 0.12 | test_int8_matvec_converts_the_weight |
| `compiler_options.decode_options` | cpu | 0.10, 0.12 | test_xla_prefers_256_bits |
| `blockwise_attention._map_heads`: head by head | cpu | 0.10, 0.12 | test_tiles_hold_all_heads |
| `blockwise_attention._map_heads`: f32 results | cpu | 0.10 | test_loops_convert_bf16_stacks |
| `blockwise_attention._tiles`: a barrier | all | 0.10, 0.12 | test_scans_hoist_masks |
| `gradient_sums.sum_over_data`: shardings of types | all | 0.10 | test_partial_shard_map_gathers |
| `swiglu.swiglu_down`: barriers | tpu | 0.12 | test_silu_is_fused_into_products |
| `rotary.rotate_custom_vjp`: a product, barriers | tpu | 0.12 | test_the_7b_step_takes_more_cycles |
| `eight_bits._tokens_last`: a layout constraint | tpu | 0.12 | test_int8_products_run_at_half_their_rate |
| `layouts.row_major`: a layout constraint | tpu | 0.12 | test_the_7b_step_takes_more_cycles |
| `layouts.materialize_cotangent`: a barrier | tpu | 0.12 | test_the_7b_step_takes_more_cycles |
| `linear.project_heads`: heads apart | tpu | 0.12 | test_the_7b_step_takes_more_cycles |
"""
