// One workgroup: mean cosine, mean squared error, loss.
{# Inside: row < rows. The three scalars have one vec4 each. #}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(local_invocation_index) lid: u32) {
    var sums = vec4<f32>();
    for (var row = lid; row < {{ rows }}u; row += {{ lanes }}u) {
        let r = rows_load(row * rows_stride);
        sums += vec4<f32>(r.x / (r.y * r.z), r.w, 0.0, 0.0);
    }
    sums = reduce(sums, lid);
    let cosine = sums.x / {{ rows }}.0;
    let mse = sums.y / {{ elements }}.0;
    if (lid == 0u) {
        loss_store(0u, vec4<f32>({{ alpha }} * (1.0 - cosine) + {{ beta }} * mse, 0.0, 0.0, 0.0));
        cosine_store(0u, vec4<f32>(cosine, 0.0, 0.0, 0.0));
        mse_store(0u, vec4<f32>(mse, 0.0, 0.0, 0.0));
    }
}
