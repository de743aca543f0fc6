"""MOELoRA: dense weights that depend on the task alone."""

from .base import Method, register_method

MOELORA_TASK = register_method(
    Method(
        name="moelora-task",
        title="When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical "
        "Applications",
        summary="dense weights from an embedding of the task; given the task, one static adapter",
        arxiv="2310.18339",
        equations="""t = T[task]                             a table (num_tasks, 64) at each module
w = softmax(W_g t)                      dense, no bias
y = W x + s sum over e of w_e B_e A_e x,  s = alpha / R,  R = E r the rank of all experts""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 2,
            "lora_alpha": 2,
            "scaling_rule": "constant",
            "lora_dropout": 0.1,
            "init_lora_weights": True,
            "expert_options": {"init_std": 0.01},
            "gate": "dense",
            "router": "task_embedding",
            "router_options": {"num_tasks": 16, "embedding_size": 64},
        },
        sources="The authors' repository (liuqidong07/MOELoRA-peft): 8 experts that share a rank "
        "of 16 and alpha 32, so 2 each and s = 32 / 16 = 2; dropout 0.1, table N(0, 1) of width "
        "64, A from N(0, 0.01); the adapted modules are all linear ones of a ChatGLM block; "
        "learning rate 2e-4. Unverified: whether 0.01 is the deviation, as here, or the variance.",
        deviations="r is the rank of one expert and lora_alpha is s itself. One dropout mask per "
        "site instead of one per expert. The repository's table has a row more than there are "
        "tasks. Everything else is fp32 or the model's dtype instead of fp16. The batch must "
        "bring task ids (molora.TaskIdCollator, molora.routing_labels).",
        citation="""@article{liu2023when,
  title={When {MOE} Meets {LLMs}: Parameter Efficient Fine-tuning for Multi-task Medical
         Applications},
  author={Liu, Qidong and Wu, Xian and Zhao, Xiangyu and Zhu, Yuanshao and Xu, Derong and
          Tian, Feng and Zheng, Yefeng},
  journal={arXiv preprint arXiv:2310.18339},
  year={2023},
}""",
    )
)
