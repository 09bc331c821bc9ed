// An adapter's scale: a range of the browser's own, which has a name for those who do not see it, and its keys.
export default {
  render({ model, el }) {
    const label = document.createElement("label");
    const range = document.createElement("input");
    const shown = document.createElement("output");
    range.type = "range";
    range.min = "0";
    range.step = "0.05";
    const name = document.createElement("span");
    name.textContent = "scale";
    label.append(name, range);
    el.classList.add("mnb-scale");
    el.append(label, shown);

    const tell = (value) => (shown.textContent = value.toFixed(2));
    const show = () => {
      range.max = String(model.get("max"));
      range.value = String(model.get("value"));
      range.disabled = model.get("disabled");
      range.title = model.get("help");
      tell(model.get("value"));
    };
    range.addEventListener("input", () => tell(range.valueAsNumber));
    range.addEventListener("change", () => {
      model.set("value", range.valueAsNumber);
      model.save_changes();
    });
    const names = ["change:max", "change:value", "change:disabled", "change:help"];
    names.forEach((name) => model.on(name, show));
    show();
    return () => names.forEach((name) => model.off(name, show));
  },
};
