// The theme searches in a worker, which browsers refuse to pages that are opened from a folder. There, and only there,
// this runs the same script in a hidden frame instead.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inner = this.frame.contentWindow
      const told = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.document.open()
      inner.document.write("<!doctype html><title>search</title>")
      inner.document.close()
      inner.postMessage = told
      inner.importScripts = (...addresses) => Promise.all(addresses.map(one => load(inner.document, one)))
      this.ready = load(inner.document, new URL(address, location.href).href)
    }

    set onmessage(hear) {
      this.addEventListener("message", hear)
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }

  const load = (page, address) => new Promise((done, failed) => {
    const script = page.createElement("script")
    script.async = false
    script.onload = done
    script.onerror = failed
    script.src = address
    page.body.append(script)
  })
}
