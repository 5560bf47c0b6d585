// Windows of a 1-D convolution: column j C + c of row r is x[source of tap j, c].
{# Inside: `cell` keeps row and col inside the result. x is read where `source` finds the tap inside its sample, at a channel below C, for a
   column below k C. #}
{% include "shared/group" %}
{% include "shared/window" %}

{% if channels % 4 != 0 %}
fn tap(start: vec2<u32>, column: u32) -> f32 {
    let window = source(start, column / {{ channels }}u);
    if (column >= {{ cols }}u || !window.inside) {
        return 0.0;
    }
    return x_at(window.row * x_stride + column % {{ channels }}u);
}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var v = vec4<f32>();
    if (col < {{ used }}u) {
        let start = origin(row);
{% if channels % 4 == 0 %}
        let window = source(start, col / {{ channels // 4 }}u);
        if (window.inside) {
            v = x_load(window.row * x_stride + col % {{ channels // 4 }}u);
        }
{% else %}
        v = vec4<f32>(tap(start, 4u * col), tap(start, 4u * col + 1u), tap(start, 4u * col + 2u), tap(start, 4u * col + 3u));
{% endif %}
    }
    finish(row, col, v);
}
