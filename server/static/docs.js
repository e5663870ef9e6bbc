"use strict";

SwaggerUIBundle({
  url: "/openapi.json",
  domNode: document.getElementById("calls"),
  deepLinking: true,
  validatorUrl: null, // the validator is on another host
});
