"""MoS: factors put together from shards of pools that all layers share."""

from .base import Method, register_method

MOS = register_method(
    Method(
        name="mos",
        title="MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
        summary="LoRA of rank 8 from shards of global pools, with the parameters of rank 2; no "
        "router",
        arxiv="2410.00938",
        equations="""y = W x + (alpha / r) B_i A_i x       for the i-th of L layers, no router
row u of A_i = [P_A[k] for k in places_i(u)]    l shards of d_in / l, at fixed random places
column u of B_i = [P_B[k] for k in places'_i(u)]    drawn apart from those of A_i
P_A (e L l, d_in / l), P_B (e L l, d_out / l)    one pair for each kind of module""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 0,
            "num_shared_experts": 1,
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "experts": "shards",
            "expert_options": {"pool_rank": 2, "shards": 4, "private_rank": 1},
        },
        sources="The authors' repository (Forence1999/MoS, modules/Tied_LoRA.py): alpha 16, "
        "dropout 0.1, pools of the size of rank 2 with active ranks from 8 to 64, all linear "
        "layers, pool A with the fan-in of a whole row, pool B zero, private shards in the last "
        "ranks; paged AdamW, linear schedule, warmup 0.03, batch 16, 10000 steps.",
        deviations="Modules share pools when they have the same name, sizes and rank in several "
        "layers. The mixture has no input-dependent part, so it merges like LoRA. The repository "
        "repeats the pool in every layer's state; here the first layer holds it. Unverified: the "
        "number of shards of a vector and of private ranks are the user's choice there; 4 and 1 "
        "are ours. The routed experts of any other method can be made of shards too, with "
        "experts='shards'.",
        citation="""@inproceedings{wang2025mos,
  title={MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards},
  author={Wang, Sheng and Chen, Liheng and Chen, Pengan and Dong, Jingwei and Xue, Boyang and
          Jiang, Jiyue and Kong, Lingpeng and Wu, Chuan},
  booktitle={International Conference on Learning Representations},
  year={2025},
}""",
    )
)
