"""Multi-Head Routing: Polytropon with a choice for each block of features."""

from .base import Method, register_method

MHR = register_method(
    Method(
        name="mhr",
        title="Multi-Head Adapter Routing for Cross-Task Generalization",
        summary="as poly, with a mix of 4 skills for each of 4 blocks of the features",
        arxiv="2211.03831",
        equations="""z = Z[:, task]                          a table (q S, tasks) per module
training: z += log u - log(1 - u), u uniform on (0, 1), drawn anew for each sequence and expert
w_ij = sigmoid(z_ij) / sum over the skills j of sigmoid(z_ij)      for each block i of q
h = sum over i, j of w_ij A_ij x_i           x_i (d_in / q) the blocks of x
y = W x + (1/r) (the blocks i of: sum over j of w_ij B_ij h)""",
        defaults={
            "target_modules": ["q_proj", "v_proj"],
            "num_experts": 16,
            "r": 8,
            "lora_alpha": 1,
            "experts": "factor_mixing",
            "expert_options": {"splits": 4},
            "router": "task_table",
            "router_options": {"num_tasks": 16},
            "gate": "grouped_sigmoid",
            "gate_options": {"groups": 4},
        },
        sources="PEFT 0.21.2 (tuners/poly) with n_splits above 1: r 8, 4 skills, the scale 1/r, no "
        "dropout, PEFT's default targets of a Llama. The number of tasks is the user's: set "
        "router_options={'num_tasks': ...}. Unverified: 4 blocks; PEFT's default is 1, which is "
        "Polytropon.",
        deviations="An expert is a skill of one block, so num_experts counts blocks times skills: "
        "change it, expert_options={'splits': q} and gate_options={'groups': q} together. What is "
        "said of poly holds here too.",
        citation="""@inproceedings{caccia2023multihead,
  title={Multi-Head Adapter Routing for Cross-Task Generalization},
  author={Lucas Caccia and Edoardo Ponti and Zhan Su and Matheus Pereira and Nicolas Le Roux and
          Alessandro Sordoni},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023},
  url={https://arxiv.org/abs/2211.03831},
}""",
    )
)
