"""What the Llama is computed with: products, quantised matrices, attention kernels, fused cross-entropy.

Every work-around for a compiler stands in this room, chosen by the platform that is lowered for.
"""
