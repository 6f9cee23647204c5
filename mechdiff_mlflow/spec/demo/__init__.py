"""The pairs that ship: two tiny fine-tunes of one tiny base model, trained on a world we made up.

`models/{base,cultural,cognitive}` are complete Hugging Face directories and
`prompts/{cultural,cognitive}/{train,val,test}.jsonl` the prompt sets; `targets.json` is what they were
measured to do. `scripts/train_demo_pairs.py` writes all of them.
"""
