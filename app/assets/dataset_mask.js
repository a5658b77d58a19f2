// A brush over a picture: what it paints is left out of training. By mouse, pen, finger or keyboard.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const MOST = 16e6; // pixels that are drawn on; larger masks are drawn smaller and enlarged when saved
  const COLOUR = "rgb(220 38 38)";
  const KEYS = "Arrows move the brush, Space paints, Shift and arrows paint a line, + and - change the size, E changes between leaving out and taking in, Ctrl-Z takes the last stroke back.";

  Studio.MaskBrush = class {
    constructor() {
      Object.assign(this, { strokes: [], stroke: null, isErasing: false, base: null });
      this.canvas = h("canvas", { "aria-hidden": "true" });
      this.ring = h("span", { class: "st-ring", "aria-hidden": "true" });
      this.element = h("div", { class: "st-brush", hidden: true, tabindex: "0", role: "application", onpointerdown: (event) => this.down(event),
        onpointermove: (event) => this.moved(event), onpointerup: () => this.up(), onpointercancel: () => this.up(), onkeydown: (event) => this.onkey(event) }, this.canvas, this.ring);
      this.size = h("input", { type: "range", min: "1", max: "40", value: "8", "aria-label": "Size of the brush", oninput: () => this.showRing() });
      const button = (text, work, attributes = {}) => h("button", { type: "button", class: "st-button", onclick: work, ...attributes }, text);
      this.draw = button("Leave out", () => this.erase(false), { "aria-pressed": "true" });
      this.rub = button("Take in", () => this.erase(true), { "aria-pressed": "false" });
      this.tools = h("div", { class: "st-mask-set" }, h("p", { class: "st-small" }, "What is red is left out of training. ", KEYS),
        h("div", { class: "st-row" }, this.draw, this.rub, h("label", { class: "st-slider" }, "Size ", this.size)),
        h("div", { class: "st-row" }, button("Undo stroke", () => this.undo()), button("Swap in and out", () => this.whole("invert")), button("Clear", () => this.whole("clear"))));
    }

    get isChanged() { return this.strokes.length > 0; }

    /** Draw on an image of that size, over the mask that is there (base64 of a PNG, or ""). */
    async begin(name, width, height, png) {
      const scale = Math.min(1, Math.sqrt(MOST / (width * height)));
      Object.assign(this, { width, height, strokes: [], stroke: null, at: [0.5, 0.5] });
      Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
      this.base = png ? await this.read(png) : null;
      this.element.ariaLabel = `Mask of ${name}. ${KEYS}`;
      this.element.hidden = false;
      this.erase(false);
      this.redraw();
    }

    end() {
      this.element.hidden = true;
      Object.assign(this, { strokes: [], stroke: null, base: null });
      this.canvas.width = this.canvas.height = 1; // gives its memory back
    }

    /** A mask file as red where it is black. */
    async read(png) {
      const image = await createImageBitmap(await (await fetch(`data:image/png;base64,${png}`)).blob());
      const { width, height } = this.canvas;
      const sheet = new OffscreenCanvas(width, height);
      const context = sheet.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0, width, height);
      const pixels = context.getImageData(0, 0, width, height);
      const { data } = pixels;
      for (let i = 0; i < data.length; i += 4) {
        data[i + 3] = 255 - data[i];
        [data[i], data[i + 1], data[i + 2]] = [220, 38, 38];
      }
      context.putImageData(pixels, 0, 0);
      return sheet;
    }

    /** The mask as a PNG of the image's size, white where to learn; base64. */
    async png() {
      const sheet = new OffscreenCanvas(this.width, this.height);
      const context = sheet.getContext("2d");
      context.drawImage(this.canvas, 0, 0, this.width, this.height);
      context.globalCompositeOperation = "source-in";
      context.fillStyle = "black";
      context.fillRect(0, 0, this.width, this.height);
      context.globalCompositeOperation = "destination-over";
      context.fillStyle = "white";
      context.fillRect(0, 0, this.width, this.height);
      const bytes = new Uint8Array(await (await sheet.convertToBlob({ type: "image/png" })).arrayBuffer());
      let text = "";
      for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
      return btoa(text);
    }

    /** Lie over what is seen of the picture. */
    place(picture) {
      const { clientWidth: width, clientHeight: height, naturalWidth, naturalHeight } = picture;
      if (!naturalWidth) return;
      const scale = Math.min(width / naturalWidth, height / naturalHeight);
      const [w, t] = [naturalWidth * scale, naturalHeight * scale];
      Object.assign(this.element.style, { left: `${picture.offsetLeft + (width - w) / 2}px`, top: `${picture.offsetTop + (height - t) / 2}px`, width: `${w}px`, height: `${t}px` });
      this.showRing();
    }

    // Painting: points are shares of width and height, sizes shares of the longer side

    erase(isErasing) {
      this.isErasing = isErasing;
      this.draw.setAttribute("aria-pressed", String(!isErasing));
      this.rub.setAttribute("aria-pressed", String(isErasing));
    }

    get thickness() { return Number(this.size.value) / 100; }

    start(point) {
      this.stroke = { points: [point], size: this.thickness, isErasing: this.isErasing };
      this.strokes.push(this.stroke);
      this.paint(this.stroke, 0);
    }

    extend(point) {
      this.stroke.points.push(point);
      this.paint(this.stroke, this.stroke.points.length - 2);
    }

    paint({ points, size, isErasing, whole }, from = 0) {
      const { width, height } = this.canvas;
      const context = this.canvas.getContext("2d");
      context.globalCompositeOperation = whole === "invert" ? "source-out" : isErasing || whole ? "destination-out" : "source-over";
      context.fillStyle = context.strokeStyle = COLOUR;
      if (whole) { context.fillRect(0, 0, width, height); return; }
      Object.assign(context, { lineWidth: Math.max(1, size * Math.max(width, height)), lineCap: "round", lineJoin: "round" });
      context.beginPath();
      if (points.length === 1) { // a line of no length would leave nothing
        context.arc(points[0][0] * width, points[0][1] * height, context.lineWidth / 2, 0, 2 * Math.PI);
        context.fill();
        return;
      }
      context.moveTo(points[from][0] * width, points[from][1] * height);
      for (const [x, y] of points.slice(from)) context.lineTo(x * width, y * height);
      context.stroke();
    }

    whole(kind) {
      this.strokes.push({ whole: kind });
      this.paint(this.strokes.at(-1));
    }

    undo() {
      this.strokes.pop();
      this.redraw();
    }

    redraw() {
      const context = this.canvas.getContext("2d");
      context.globalCompositeOperation = "copy";
      if (this.base) context.drawImage(this.base, 0, 0);
      else context.clearRect(0, 0, this.canvas.width, this.canvas.height);
      context.globalCompositeOperation = "source-over";
      for (const stroke of this.strokes) this.paint(stroke);
    }

    pointOf(event) {
      const { left, top, width, height } = this.element.getBoundingClientRect();
      return [(event.clientX - left) / width, (event.clientY - top) / height];
    }

    down(event) {
      if (event.button !== 0) return;
      this.element.setPointerCapture(event.pointerId);
      this.at = this.pointOf(event);
      this.start(this.at);
    }

    moved(event) {
      this.at = this.pointOf(event);
      if (this.stroke) this.extend(this.at);
      this.showRing();
    }

    up() { this.stroke = null; }

    showRing() {
      if (this.element.hidden || !this.at) return;
      const longer = Math.max(this.element.clientWidth, this.element.clientHeight);
      const side = this.thickness * longer;
      Object.assign(this.ring.style, { width: `${side}px`, height: `${side}px`, left: `${this.at[0] * 100}%`, top: `${this.at[1] * 100}%` });
    }

    onkey(event) {
      const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const way = ways[event.key];
      if (way) {
        const from = this.at;
        const step = this.thickness / 2;
        this.at = from.map((share, axis) => Math.max(0, Math.min(1, share + way[axis] * step)));
        if (event.shiftKey) { this.start(from); this.extend(this.at); this.up(); }
      } else if (event.key === " ") { this.start(this.at); this.up(); }
      else if (event.key === "+" || event.key === "=") this.size.value = Number(this.size.value) + 1;
      else if (event.key === "-") this.size.value = Number(this.size.value) - 1;
      else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) this.undo();
      else if (event.key === "e") this.erase(!this.isErasing);
      else return;
      event.preventDefault();
      event.stopPropagation();
      this.showRing();
    }
  };
})();
