"""Fine-tune the packaged MiniLM across ten simulated devices and load the adapter in PEFT."""

from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import polyrank
from polyrank.models.load import packaged_model

config = polyrank.Config(
    rounds=3,
    partition={"kind": "dirichlet", "clients": 10, "alpha": 0.5},
    sampling={"kind": "count", "count": 4},
    adapter={"rank": 4, "targets": "attention"},
    training={"local_steps": 5, "learning_rate": 3e-3},
)
result = polyrank.run(config)
print(result.summary["test_accuracy"], result.path / "report.html")

base = AutoModelForSequenceClassification.from_pretrained(packaged_model(), num_labels=8)
model = PeftModel.from_pretrained(base, result.path / "adapter")
print(model.peft_config["default"].r)
