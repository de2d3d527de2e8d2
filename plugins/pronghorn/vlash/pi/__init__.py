"""pi0 and pi0.5 over shared observations: one pass for all delays in training, one for the prefix in inference.

Plain functions over the layers of whoever built the model. They look for `self_attn.{q,k,v,o}_proj`,
`mlp.{gate,up,down}_proj`, `input_layernorm` and `post_attention_layernorm`, so they run LeRobot's modules, LoRA around
them or not, as well as the small ones of `layers`.
"""
