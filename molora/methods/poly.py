"""Polytropon: tasks choose among an inventory of skills."""

from .base import Method, register_method

POLY = register_method(
    Method(
        name="poly",
        title="Combining Modular Skills in Multitask Learning",
        summary="a row of sigmoids per task mixes the factors of 4 skills, then multiplies",
        arxiv="2202.13914",
        equations="""z = Z[:, task]                          a table (E, tasks) per module
training: z += log u - log(1 - u), u uniform on (0, 1), drawn anew for each sequence and expert
w_e = sigmoid(z_e) / sum of sigmoid(z)
y = W x + (1/r) (sum over e of w_e B_e) (sum over e of w_e A_e) x""",
        defaults={
            "target_modules": ["q_proj", "v_proj"],
            "num_experts": 4,
            "r": 8,
            "lora_alpha": 1,
            "experts": "factor_mixing",
            "router": "task_table",
            "router_options": {"num_tasks": 16},
            "gate": "grouped_sigmoid",
        },
        sources="PEFT 0.21.2 (tuners/poly): r 8, 4 skills, the scale 1/r, no dropout, PEFT's "
        "default targets of a Llama, Z uniform in [-1e-3, 1e-3]; microsoft/mttl. The number of "
        "tasks is the user's: set router_options={'num_tasks': ...}.",
        deviations="mttl draws nothing in training (router_options={'relaxed': False}) and scales "
        "by alpha/r with alpha 16. The sum under the fraction has no 1e-12 added to it; it is "
        "formed so that it can't underflow. Unverified: the papers advise a larger learning rate "
        "for Z; give its parameters, named '.molora_router.', a group of their own.",
        citation="""@article{ponti2022combining,
  title={Combining Modular Skills in Multitask Learning},
  author={Edoardo M. Ponti and Alessandro Sordoni and Yoshua Bengio and Siva Reddy},
  journal={arXiv preprint arXiv:2202.13914},
  year={2022},
}""",
    )
)
