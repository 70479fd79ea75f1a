"""Print steps of torch.optim.AdamW as JSON.

    python tests/support/make_golden_adamw.py > tests/data/golden_adamw.json

Needs torch; the tests do not.
"""
import json

import torch

SETTINGS = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
w = torch.nn.Parameter(torch.tensor([0.5, -1.25, 3.0, 0.0, 1e-3], dtype=torch.float64))
optimizer = torch.optim.AdamW([w], **SETTINGS)
steps = []
for t in range(1, 6):
    w.grad = torch.tensor([0.1 * t, -0.2 / t, 1e-6, 0.0, (-1.0) ** t], dtype=torch.float64)
    optimizer.step()
    state = optimizer.state[w]
    steps.append({"gradient": w.grad.tolist(), "weight": w.tolist(), "exp_avg": state["exp_avg"].tolist(),
                  "exp_avg_sq": state["exp_avg_sq"].tolist()})
print(json.dumps({"torch": torch.__version__, **SETTINGS, "start": [0.5, -1.25, 3.0, 0.0, 1e-3], "steps": steps},
                 indent=1))
