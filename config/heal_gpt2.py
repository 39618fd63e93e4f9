# Can a pretrained model lose its query matrix? W_Q = I in all layers, with the W_K that fits best (least squares), then
# fine-tuning, beside the same model fine-tuned as it is. Step 0 of the report's curves is the loss before, and after
# the fit. GPT-2 itself, on its own kind of tokens (not run yet):
#     python hf.py import --from=gpt2 --out=out/heal/original
#     python eliminate.py --ckpt=out/heal/original/ckpt.pt --approximate --windows=256 --dataset=openwebtext \
#         --out=out/heal/fitted/ckpt.pt
#     python sweep.py config/heal_gpt2.py --learning_rate=1e-4 --max_iters=2000 --warmup_iters=100 --dataset=openwebtext
#     python report.py out/heal_gpt2
# The same at toy size, with a model that is trained here in place of GPT-2: results/heal_gpt2/README.md.
arms = {
    "original": "--init_from=out/heal/original/ckpt.pt",
    "healed": "--init_from=out/heal/fitted/ckpt.pt",
}
control = "original"
settings = "--lr_decay_iters=none"
seeds = [1, 2, 3]
