"""Your transformers MoE, seen and mended in ten lines: a marimo notebook on a tiny random model.

Open it with `marimo edit docs/notebooks/seen_and_mended.py`, or run it with Python.
It needs the extras `moestro[hf,report]` and marimo, and no network.
"""

import marimo

app = marimo.App(width="medium")


@app.cell
def _():
    import marimo as mo
    import plotly.graph_objects as go
    import torch
    import transformers

    import moestro
    import moestro.hf

    return go, mo, moestro, torch, transformers


@app.cell
def _(mo):
    mo.md("""
    # Your transformers MoE, seen and mended in ten lines

    ```python
    import moestro.hf

    print(moestro.hf.diagnose(model))                  # 1  what would go wrong in training
    moestro.hf.use_experts(model)                      # 2  our kernels: any size, any dtype
    log = moestro.watch(model)                         # 3  every router, from outside
    for batch in batches:
        with log.recording():                          # 4
            loss = model(**batch).loss                 # 5
        print(log.layer_losses())                      # 6  1 is even, for each layer by itself
        (loss + 0.01 * log.auxiliary_loss()).backward()  # 7
        optimizer.step()                               # 8
        optimizer.zero_grad()                          # 9
    model.save_pretrained("mended")                    # 10  still a stock model
    ```

    Below, the same on a tiny random Mixtral, so that it runs in seconds. Put `from_pretrained("your/model")` in
    its place. Every number and picture of this page is computed when it runs.
    """)
    return


@app.cell
def _(torch, transformers):
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    NUM_LAYERS, NUM_EXPERTS = 4, 4
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=34,  # no multiple of 16 bytes, as models with odd sizes have
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=1,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(3, 64, (8, 24))
    mask = torch.ones_like(ids)
    mask[:3, 16:] = 0  # three short texts, padded
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return NUM_EXPERTS, batch, config, model


@app.cell
def _(mo):
    mo.md("""
    ## What would go wrong?

    `moestro doctor FOLDER` on the command line, `diagnose` in Python. No weight is read.
    """)
    return


@app.cell
def _(mo, model, moestro):
    findings = moestro.hf.diagnose(model)
    mo.md("\n".join(f"- **{each.name}**: {each.what}.\n\n  ```python\n  {each.mend}\n  ```" for each in findings))
    return (findings,)


@app.cell
def _(mo):
    mo.md("""
    ## The default path stops; ours runs

    transformers' default experts (`grouped_mm`) refuse a hidden size of 34 floats, which is no multiple of
    16 bytes.
    """)
    return


@app.cell
def _(batch, mo, model, moestro):
    try:
        model(**batch)
        crash = "(this version of torch takes it)"
    except RuntimeError as error:
        crash = str(error).splitlines()[0]
    moestro.hf.use_experts(model)
    mended_loss = float(model(**batch).loss.detach())
    mo.md(f"**Before:** {crash}\n\n**After `use_experts`:** loss {mended_loss:.3f}")
    return crash, mended_loss


@app.cell
def _(mo):
    mo.md("""
    ## A collapse that transformers cannot see

    Each layer of this model is made to send every token to one expert: layer 0 to expert 0, layer 1 to
    expert 1, and so on. transformers' balance loss adds up the layers' loads before it multiplies them, and
    together they are perfectly even.
    """)
    return


@app.cell
def _(NUM_EXPERTS, batch, config, model, moestro, torch, transformers):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    collapsed = moestro.hf.use_experts(transformers.AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        collapsed.load_state_dict(model.state_dict())
        collapsed.get_input_embeddings().weight[:, 0] = 10.0  # a feature that every token has
        for number, layer in enumerate(collapsed.model.layers):
            layer.mlp.gate.weight[:, 0] = 0.0
            layer.mlp.gate.weight[number, 0] = 1.5
        for layer in collapsed.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.experts.down_proj.mul_(0.01)
        collapsed_log = moestro.watch(collapsed)
        with collapsed_log.recording():
            output = collapsed(**batch, output_router_logits=True)
        per_layer = collapsed_log.layer_losses()
        pooled = float(load_balancing_loss_func(output.router_logits, NUM_EXPERTS, 1, batch["attention_mask"]))
    return collapsed, collapsed_log, per_layer, pooled


@app.cell
def _(go, mo, per_layer, pooled):
    names = [f"layer {number}" for number in range(len(per_layer))]
    collapse_figure = go.Figure(
        [
            go.Bar(x=names, y=list(per_layer.values()), name="each layer by itself", marker_color="#9db4d6"),
            go.Scatter(x=names, y=[pooled] * len(names), name="transformers: pooled", line_color="#b3261e"),
        ]
    )
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    collapse_figure.update_layout(height=340, yaxis_title="balance loss", legend=legend, margin_r=20)
    worst = max(per_layer.values())
    mo.vstack(
        [
            mo.md(
                f"Each layer by itself: **{worst:.2f}** at worst. transformers' loss: **{pooled:.2f}**. "
                "1 is even, 4 is one expert of four."
            ),
            collapse_figure,
        ]
    )
    return collapse_figure, legend


@app.cell
def _(mo):
    mo.md("""
    ## Mended by the plain loop

    Forty steps of the ten lines on the collapsed model. Top-1 with renormalised weights gives the router no
    gradient from the task at all (`dead-router` above), hence `revive_routers`.
    """)
    return


@app.cell
def _(batch, collapsed, collapsed_log, moestro, torch):
    moestro.hf.revive_routers(collapsed)
    collapsed.train()
    optimizer = torch.optim.AdamW(collapsed.parameters(), lr=0.05)
    history = []
    for _step in range(40):
        with collapsed_log.recording():
            loss = collapsed(**batch).loss
        history.append(list(collapsed_log.layer_losses().values()))
        (loss + 0.1 * collapsed_log.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), collapsed_log.recording():
        collapsed(**batch)
    healed = collapsed_log.layer_losses()
    return healed, history


@app.cell
def _(go, healed, history, legend, mo):
    loop_figure = go.Figure(
        [
            go.Scatter(y=[row[number] for row in history], name=f"layer {number}")
            for number in range(len(history[0]))
        ]
    )
    loop_figure.update_layout(
        height=340, xaxis_title="step", yaxis_title="balance loss", legend=legend, margin_r=20
    )
    end = max(healed.values())
    mo.vstack([mo.md(f"The worst layer goes from {max(history[0]):.2f} to **{end:.2f}**."), loop_figure])
    return (loop_figure,)


@app.cell
def _(mo):
    mo.md("""
    ## Record once, replay elsewhere

    The same experts for every token, though the model now runs in bfloat16 and in other micro-batches.
    """)
    return


@app.cell
def _(batch, collapsed, config, mo, moestro, torch, transformers):
    with torch.no_grad(), moestro.watch(collapsed).record() as trace:
        collapsed.eval()(**batch)
    half = transformers.AutoModelForCausalLM.from_config(config)
    half.load_state_dict(collapsed.state_dict())
    moestro.hf.use_experts(half.to(torch.bfloat16).eval())
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 4), slice(4, 8))]

    def choices():
        log, found = moestro.watch(half), []
        for each in halves:
            with torch.no_grad(), log.recording():
                half(**each)
            found.append(torch.stack([log.decisions[name][0].notes["choice"][:, 0] for name in log.layers]))
        log.close()
        return torch.cat(found, dim=1)[:, batch["attention_mask"].flatten().bool()]

    recorded = torch.stack([layer.index[:, 0].long() for layer in trace.layers.values()])
    same_alone = float((choices() == recorded).double().mean())
    with moestro.replay(half, trace):
        same_replayed = float((choices() == recorded).double().mean())
    mo.md(
        f"By itself, the bfloat16 model takes **{100 * same_alone:.1f} %** of the recorded experts; in the replay "
        f"**{100 * same_replayed:.1f} %**."
    )
    return same_alone, same_replayed


@app.cell
def _(mo):
    mo.md("""
    ## And on the command line

    ```
    moestro doctor FOLDER           # defects and their mends, from config.json alone
    moestro inspect FOLDER          # a page: load, specialisation, dead experts, router health
    moestro diff BEFORE AFTER       # what training changed
    moestro convert SRC DST --to gguf
    ```

    More in `docs/transformers.md`, `docs/inspect.md` and `docs/layouts.md`.
    """)
    return


if __name__ == "__main__":
    app.run()
